"""What the tasks are made of: files inside installed packages, espeak-ng's voices, distorted images."""
