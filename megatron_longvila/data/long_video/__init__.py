"""The long-video instruction set: from a folder of videos to checked question and summary samples, stage by stage over one folder."""
