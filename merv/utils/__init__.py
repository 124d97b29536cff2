"""General helpers: plug-ins, files, the Hugging Face hub, downloaded assets, distributed processes, plots."""
