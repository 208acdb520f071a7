// echo HOST PORT
package main

import (
	"io"
	"net"
	"os"
)

func main() {
	listener, err := net.Listen("tcp", net.JoinHostPort(os.Args[1], os.Args[2]))
	if err != nil {
		panic(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go func() {
			// Through a buffer of its own, as a handler would.
			io.Copy(connection, struct{ io.Reader }{connection})
			connection.Close()
		}()
	}
}
