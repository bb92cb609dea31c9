"""MONAI Label on our bundles: a server that 3D Slicer asks for masks, sends corrected ones to, and trains on them.

`main.py` (the app) and `server.py` (its routes) alone import monailabel, which is the extra `label`; the rest is the
arithmetic behind them and runs anywhere.
"""
