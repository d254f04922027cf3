"""What every test finds, wherever it runs."""

import os

# Before any test file imports huggingface_hub, which reads it once. Machines with and without a network then give
# the same errors for a name that is neither a folder nor on the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MLXQ_TRACEBACK", None)  # tests read the one line that bad input gives
