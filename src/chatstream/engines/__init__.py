"""Ways to generate text. `base.py` is the contract; everything else is one engine a file or folder."""
