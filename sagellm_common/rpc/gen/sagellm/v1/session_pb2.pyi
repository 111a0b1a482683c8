from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class LocateSessionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LocateSessionResponse(_message.Message):
    __slots__ = ("port", "token")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    port: int
    token: str
    def __init__(self, port: _Optional[int] = ..., token: _Optional[str] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("service", "token")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    service: str
    token: str
    def __init__(self, service: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...
