wrk.method = "POST"
wrk.body = '{"message":"bench","data":{"number":1000000,"by":"000","pad":""}}'
wrk.headers["Content-Type"] = "application/json"
