"""The tuned model beside the reference: the same conditions, the same noise."""
