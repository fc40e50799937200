"""Choosing schedules: candidates, a cost model, and measurement."""
