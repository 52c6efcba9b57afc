"""Synthetic multi-series brain MRI with gliomas and labels, for tests and demonstrations without real subjects.

One set of tissue fractions a subject (`anatomy`) feeds every series through the MR signal equations (`tissues`), so the series
share their anatomy but not their order of contrasts: a series follows from what the tissue is, hardly from another series' value
in that voxel. `subject` makes the images, `task` writes them.
"""

from nnunet_csm.phantom.anatomy import LABELS
from nnunet_csm.phantom.subject import PhantomSpec, Subject, draw_subject
from nnunet_csm.phantom.task import write_task

__all__ = ["LABELS", "PhantomSpec", "Subject", "draw_subject", "write_task"]
