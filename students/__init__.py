"""Students: timm backbones with named feature maps and a head for the task."""
