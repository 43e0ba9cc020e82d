"""Measuring: time, cost, records, the choice among recipes, and the report."""
