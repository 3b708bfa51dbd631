"""The checks of a data set: of its annotations alone, which is fast, and of all its images.

Each module has functions from splits to findings; :mod:`~cpm_rcnn.data.doctor.examination` calls all of them.
"""
