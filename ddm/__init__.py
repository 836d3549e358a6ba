"""What the stages share. No file in here imports a stage; docs/hacking.md says where to look."""
