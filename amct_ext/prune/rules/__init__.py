"""Rules, one per operator: the channel maps of its outputs from those of its inputs."""
