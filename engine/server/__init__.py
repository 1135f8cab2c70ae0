"""The engine behind HTTP: one queue, the protocols of Gemini, OpenAI and NVIDIA NIM."""
