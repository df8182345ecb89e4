"""The kernel IR: fusion, index expressions, loops (`kernel.py` has its data). Nothing of any language is here."""
