"""What every test finds, wherever it runs."""

import os
import signal

import mlx.core as mx

# Set before any test file imports huggingface_hub, which reads it once: machines with and without a network
# give the same errors.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLXQ_AUTOTUNE"] = "0"  # else a tuning file in the user's cache decides which kernels run
os.environ.pop("MLXQ_TRACEBACK", None)  # tests read the one line that bad input gives

# A shell without job control starts `make test &` with Ctrl-C ignored, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a Mac the default device is the GPU, where a test that forces a CPU kernel would not meet it.
# What is for Metal says so itself.
if mx.metal.is_available():
    mx.set_default_device(mx.cpu)
