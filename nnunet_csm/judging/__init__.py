"""What judges a pretraining: hidden errors beside linear maps, lesions in frozen features, a plateau, what fine-tuning uses."""
