"""Several GPUs and several nodes by Ray, the optional extra `ray`. Nothing outside this folder imports Ray."""
