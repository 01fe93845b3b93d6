"""Recipes, verdicts, defect maps and golden templates."""
