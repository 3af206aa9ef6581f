"""Measuring models: size, load, execution, workspace, and what each optimization buys."""
