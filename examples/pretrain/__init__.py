"""Self-supervised pretraining on images: methods, data, protocols, and reports on what each ingredient adds."""
