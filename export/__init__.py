"""Checkpoints to bundles: graphs are written straight from the tensors, without torch and without tracing.

A map for those who read the code. `export`, in the module `exporter`, is the recipe from top to bottom.

Checkpoint: `sources` (what a user may name), `checkpoint` (the protocol, the Hugging Face folder, `Weights`), `hub`,
    `gguf_checkpoint`, `gguf_file` and `gguf_tokenizer`; `official`, `random_checkpoint` and `random_tokenizer` for
    `--random`.
Family: one module of `families` for each, found by `model_type`; its docstring says what a family must define.
Graph: `builder` (nodes, weights file), `blocks` (norms, layers, towers), `attention`, `matrices` and `tables` (in the
    formats of a `plan`), `cuda_rules` (what a GPU asks of a graph).
Precision: `plan` (formats by rule), `calibration` and the modules that begin with its name (formats by measurement),
    `state_scales` (steps of keys and values in 8 bits), `piecewise` (runs the float32 model without its memory),
    `graph_losses` (what the formats cost).
Bundle: `generation` (stop ids, sampling defaults), `self_check` (work of child processes), `child` (starts them),
    `output_folder` (all or nothing).
Demo: `demo` draws the scenes, trains the embedded model and measures it.

`optimum` holds the one file that registers a command with optimum-cli.
"""
