"""Configuration: text or JSON to frozen dataclasses, and with the layers of a model to a plan."""
