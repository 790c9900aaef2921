"""Judgements about text, each behind one interface (`interface.py`), with labelled cases and measured bars.

The defaults work offline. A stronger model is named in the settings by a folder or a hub id (`model.py`).
"""
