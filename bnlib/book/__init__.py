"""What the chapters show: their images, their drawings and the figures to touch.

No module of the library imports this package; it needs what ``pip install 'bnlib[book]'`` brings.
"""
