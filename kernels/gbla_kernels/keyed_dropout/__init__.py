"""Dropout of elements that the tokens' keys choose, with the residual sum; its backward is the same kernel."""
