"""Looking at programs: pictures and comparisons. Sits on top of the core; nothing in the core imports it."""
