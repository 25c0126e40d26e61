"""Training steps and evaluations of other toolkits beside ours."""
