"""``fdml.export``: from a student to the bundle that is deployed, with the evidence that it is as robust as before."""
