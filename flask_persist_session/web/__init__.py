"""What an application can show of its sessions; each module is a blueprint that it registers if it wants to."""
