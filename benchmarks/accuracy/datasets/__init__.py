"""Data of the tasks: files inside installed packages, espeak-ng's voices, distorted images."""
