"""The device side: kernel templates (Jinja) and the headers they include. Data, no code."""
