"""What a paper has to say of a run: a methods section, references, a checklist; `nnunet_csm cite`."""
