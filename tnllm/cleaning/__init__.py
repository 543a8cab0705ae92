"""The corpus pipeline's upper half: recipes, scoring by a model, self-cleaning, the whole run. See docs/cleaning.md."""
