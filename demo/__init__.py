"""Chat with a model and its adapter in a browser: `python -m demo --model miniworld`."""

import os

# Set before Gradio or the hub is imported anywhere: both read them at import and would report usage otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
