"""From a model directory to the one right vLLM command. Pure: nothing here starts a process."""
