"""The public functions: create, restore and save of each flow, calibration, settings, the search for pruning ratios."""
