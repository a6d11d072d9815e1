// A registry in memory that has the referrers endpoint of the distribution specification 1.1, which Debian's
// docker-registry has not. It prints its address, and ends when its standard input does.
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr())

	handler := registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))
	go func() { log.Fatal(http.Serve(listener, handler)) }()

	io.Copy(io.Discard, os.Stdin)
}
