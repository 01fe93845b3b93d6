"""A network camera for tests: GStreamer's RTSP server with a test picture. Run by the system's Python, which has its bindings.

/usr/bin/python3 tests/rtsp_camera.py PORT ENCODER PAYLOADER
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

port, encoder, payloader = sys.argv[1:]
Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(port)
factory = GstRtspServer.RTSPMediaFactory()
picture = "video/x-raw,format=I420,width=320,height=240,framerate=10/1"
factory.set_launch(f"( videotestsrc is-live=true pattern=smpte ! {picture} ! {encoder} ! {payloader} name=pay0 pt=96 )")
server.get_mount_points().add_factory("/line", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
