// Go's net/http. argv: "serve" port, or "ask" host port count: requests on 4 kept connections; prints {"ok", "wrong"}.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
)

func serve(port string) {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		parts := strings.Split(r.URL.Path, "/")
		asked, _ := io.ReadAll(r.Body)
		body := strconv.Itoa(len(asked))
		if r.Method != "POST" {
			size := 2
			if len(parts) > 2 {
				size, _ = strconv.Atoi(parts[2])
			}
			body = strings.Repeat("x", size)
		}
		w.Header().Set("X-Tag", parts[len(parts)-1])
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		io.WriteString(w, body)
	})
	panic(http.ListenAndServe(":"+port, nil))
}

func main() {
	if os.Args[1] == "serve" {
		serve(os.Args[2])
	}
	count, _ := strconv.Atoi(os.Args[4])
	client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 4, MaxIdleConnsPerHost: 4}}
	var group sync.WaitGroup
	var lock sync.Mutex
	ok, wrong := 0, ""
	for lane := 0; lane < 4; lane++ {
		group.Add(1)
		go func(lane int) {
			defer group.Done()
			for number := lane; number < count; number += 4 {
				size, tag := 10+number*37%30000, fmt.Sprintf("go-%d-%d", os.Getpid(), number)
				answer, err := client.Get(fmt.Sprintf("http://%s:%s/size/%d/%s", os.Args[2], os.Args[3], size, tag))
				said := fmt.Sprint(err)
				right := false
				if err == nil {
					body, _ := io.ReadAll(answer.Body)
					answer.Body.Close()
					right = answer.StatusCode == 200 && len(body) == size && answer.Header.Get("X-Tag") == tag
					said = answer.Status
				}
				lock.Lock()
				if right {
					ok++
				} else {
					wrong += tag + " " + said + ";"
				}
				lock.Unlock()
			}
		}(lane)
	}
	group.Wait()
	fmt.Printf("{\"ok\": %d, \"wrong\": %q}\n", ok, wrong)
}
