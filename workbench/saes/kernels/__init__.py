"""Sparse code and the products that training computes with it."""
