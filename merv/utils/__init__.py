"""Small things that know nothing of video: files, the hub, fetched assets, plots, plug-ins, processes."""
