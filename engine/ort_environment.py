"""What must be so before onnxruntime is loaded: that it is there, and that its telemetry is off.

From 1.29 on its packages for Linux and macOS keep what they load and run, with an id of the device, in a database in
the user's cache folder, and send it to their maker. What runs on a device is nobody else's business. Besides, a process
that is forked from one with the telemetry's threads hangs when it ends. Who wants it sets ORT_DISABLE_TELEMETRY=0.
"""

import importlib.util
import os
import sys

__all__ = []

# There are two packages of it, one for each kind of device, and no installer can know which is wanted.
if importlib.util.find_spec("onnxruntime") is None:
    raise ModuleNotFoundError(
        "siglance needs onnxruntime: pip install 'siglance[cpu]', or 'siglance[gpu]' for an NVIDIA card",
        name="onnxruntime",
    )

if os.environ.get("ORT_DISABLE_TELEMETRY") != "0":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # The program around us may have loaded onnxruntime already.
    if "onnxruntime" in sys.modules:
        sys.modules["onnxruntime"].disable_telemetry_events()
