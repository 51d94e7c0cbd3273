//! Requests and answers of an agent's local status socket.
