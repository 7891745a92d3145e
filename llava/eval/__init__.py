"""Evaluation: answering question files with a model, scoring the answers, tables and pictures.

Importing this package imports nothing else, so that scoring needs neither torch nor a checkpoint.
"""
