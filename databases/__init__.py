"""Databases that users ask for: rows here, real databases behind them."""
