"""One short script a dataset, from a release to nnU-Net's raw folder; installed as `nnunet_csm.dataset_conversion`."""
