"""Events and what is made of them: the log, feedback, grading, curation, splits, manifests, erasure.

The files of this folder are the log and the stages of curation; what has a purpose of its own has a folder.
"""
