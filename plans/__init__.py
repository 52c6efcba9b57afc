"""JSON presets for `nnunet_csm plan -preset NAME`; installed as `nnunet_csm.presets`."""
