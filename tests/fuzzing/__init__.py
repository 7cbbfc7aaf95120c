"""Hostile inputs for everything that reads what others wrote, and a watch over what becomes of them."""
