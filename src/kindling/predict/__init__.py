"""Prediction: `engine` runs the net on packed rows (no Spark), `batch` runs engines over DataFrames.

`output` keeps featurised Parquet and its provenance. Nothing is imported here: Spark workers open these modules before
torch may be loaded.
"""
