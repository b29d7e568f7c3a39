"""The planner held against published and measured runs."""
